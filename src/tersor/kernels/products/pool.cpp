// See pool.h. Threads wait by spinning for a moment, then sleep: the products of one token follow each other within
// microseconds, and waking a thread takes longer than a small product. Handing out parts takes no lock.
#include "pool.h"

#include <algorithm>
#include <atomic>
#include <chrono>
#include <condition_variable>
#include <exception>
#include <mutex>
#include <system_error>
#include <thread>
#include <vector>

#if defined(__x86_64__) || defined(_M_X64)
#include <immintrin.h>
#endif
#if defined(__unix__) || defined(__APPLE__)
#include <pthread.h>
#endif

namespace tersor {
namespace {

// How long an idle thread spins before it sleeps.
constexpr std::chrono::microseconds SPIN{100};
// Parts of one job.
constexpr int64_t MOST = int64_t{1} << 30;

void relax() {
#if defined(__x86_64__) || defined(_M_X64)
    _mm_pause();
#endif
}

thread_local bool inside = false;

class Pool {
  public:
    ~Pool() { stop(); }

    void run(int64_t parts, int threads, Work work, const void* context) {
        std::lock_guard<std::mutex> one(caller_);
        const int helpers = grow(static_cast<int>(std::min<int64_t>(threads, parts)) - 1);
        work_.store(work, std::memory_order_relaxed);
        context_.store(context, std::memory_order_relaxed);
        parts_.store(parts, std::memory_order_relaxed);
        helpers_.store(helpers, std::memory_order_relaxed);
        done_.store(0, std::memory_order_relaxed);
        failure_ = nullptr;
        const uint64_t job = (next_.load(std::memory_order_relaxed) >> 32) + 1;
        // In one order with the count of sleepers: either this sees who goes to sleep, or they see the new job.
        next_.store(job << 32 | static_cast<uint64_t>(parts));
        if (asleep_.load() > 0) {
            std::lock_guard<std::mutex> lock(mutex_);
            wake_.notify_all();
        }
        inside = true;
        take_parts(job);
        inside = false;
        while (done_.load(std::memory_order_acquire) < parts) relax();
        if (failure_) std::rethrow_exception(failure_);
    }

  private:
    // At least `wanted` helpers, or as many as the system allows.
    int grow(int wanted) {
        try {
            while (static_cast<int>(threads_.size()) < wanted) {
                const int number = static_cast<int>(threads_.size());
                threads_.emplace_back([this, number] { serve(number); });
            }
        } catch (const std::system_error&) {
            return static_cast<int>(threads_.size());
        }
        return wanted;
    }

    // A part is taken by making the count of those left smaller, which fails for whoever is late and still thinks of an
    // earlier job: the job's number is in the same word. While a part is taken and not done its job cannot end, so what
    // is read after that is of this job. Nothing is thrown from here: the first failure is kept for the caller.
    void take_parts(uint64_t job) {
        for (uint64_t seen = next_.load(std::memory_order_acquire);;) {
            const int64_t left = static_cast<int64_t>(seen & 0xffffffffu);
            if (seen >> 32 != job || left == 0) return;
            if (!next_.compare_exchange_weak(seen, seen - 1, std::memory_order_acq_rel, std::memory_order_acquire)) continue;
            const int64_t part = parts_.load(std::memory_order_relaxed) - left;
            try {
                work_.load(std::memory_order_relaxed)(part, context_.load(std::memory_order_relaxed));
            } catch (...) {
                std::lock_guard<std::mutex> lock(mutex_);
                if (!failure_) failure_ = std::current_exception();
            }
            done_.fetch_add(1, std::memory_order_release);
            seen = next_.load(std::memory_order_acquire);
        }
    }

    void serve(int number) {
        inside = true;
        // A thread that is made for a job finds it as its first.
        for (uint64_t seen = 0; wait_beyond(seen);) {
            seen = next_.load(std::memory_order_acquire) >> 32;
            if (number < helpers_.load(std::memory_order_relaxed)) take_parts(seen);
        }
    }

    bool wait_beyond(uint64_t seen) {
        const auto end = std::chrono::steady_clock::now() + SPIN;
        do {
            for (int i = 0; i < 64; ++i) {
                if (stopping_.load(std::memory_order_relaxed)) return false;
                if (next_.load(std::memory_order_acquire) >> 32 != seen) return true;
                relax();
            }
        } while (std::chrono::steady_clock::now() < end);
        std::unique_lock<std::mutex> lock(mutex_);
        asleep_.fetch_add(1);
        wake_.wait(lock, [&] { return stopping_.load() || next_.load() >> 32 != seen; });
        asleep_.fetch_sub(1);
        return !stopping_.load();
    }

    void stop() {
        {
            std::lock_guard<std::mutex> lock(mutex_);
            stopping_.store(true);
            wake_.notify_all();
        }
        for (std::thread& thread : threads_) thread.join();
    }

    std::mutex caller_, mutex_;
    std::condition_variable wake_;
    std::atomic<uint64_t> next_{0};  // the job's number in the high half, how many of its parts are left in the low one
    std::atomic<Work> work_{nullptr};
    std::atomic<const void*> context_{nullptr};
    std::atomic<int64_t> parts_{0}, done_{0};
    std::atomic<int> helpers_{0}, asleep_{0};
    std::atomic<bool> stopping_{false};
    std::exception_ptr failure_;
    std::vector<std::thread> threads_;
};

std::mutex making;
Pool* pool = nullptr;

Pool& shared_pool() {
    std::lock_guard<std::mutex> lock(making);
    if (pool == nullptr) {
#if defined(__unix__) || defined(__APPLE__)
        // A forked child has none of the threads, and perhaps locked mutexes: it starts anew and leaves the old pool be.
        static const int registered = pthread_atfork(
            [] { making.lock(); }, [] { making.unlock(); },
            [] {
                pool = nullptr;
                inside = false;
                making.unlock();
            });
        (void)registered;
#endif
        // Never destroyed: at exit its threads may be asleep in a library that is already gone.
        pool = new Pool();
    }
    return *pool;
}

}  // namespace

void run_parts(int64_t parts, int threads, Work work, const void* context) {
    if (parts <= 1 || threads <= 1 || inside || parts >= MOST) {
        for (int64_t part = 0; part < parts; ++part) work(part, context);
        return;
    }
    shared_pool().run(parts, threads, work, context);
}

}  // namespace tersor
