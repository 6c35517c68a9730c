// See pool.h. Threads wait by spinning for a moment, then sleep: the products of one token follow each other within
// microseconds, and waking a thread takes longer than a small product. Handing out parts takes no lock.
#include "pool.h"

#include <algorithm>
#include <atomic>
#include <chrono>
#include <condition_variable>
#include <mutex>
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
        const int helpers = static_cast<int>(std::min<int64_t>(threads, parts)) - 1;
        while (static_cast<int>(threads_.size()) < helpers) {
            const int number = static_cast<int>(threads_.size());
            threads_.emplace_back([this, number] { serve(number); });
        }
        work_.store(work, std::memory_order_relaxed);
        context_.store(context, std::memory_order_relaxed);
        parts_.store(parts, std::memory_order_relaxed);
        helpers_.store(helpers, std::memory_order_relaxed);
        done_.store(0, std::memory_order_relaxed);
        const uint64_t job = (next_.load(std::memory_order_relaxed) >> 32) + 1;
        // In one order with the count of sleepers: either this sees who goes to sleep, or they see the new job.
        next_.store(job << 32);
        if (asleep_.load() > 0) {
            std::lock_guard<std::mutex> lock(mutex_);
            wake_.notify_all();
        }
        inside = true;
        take_parts(job);
        inside = false;
        while (done_.load(std::memory_order_acquire) < parts) relax();
    }

  private:
    // A part is taken by moving `next_` on, which fails for whoever is late and still thinks of an earlier job. While a
    // part is taken and not done its job cannot end, so what is read of the job before that is of this job.
    void take_parts(uint64_t job) {
        for (uint64_t seen = next_.load(std::memory_order_acquire);;) {
            const int64_t part = static_cast<int64_t>(seen & 0xffffffffu);
            const Work work = work_.load(std::memory_order_relaxed);
            const void* context = context_.load(std::memory_order_relaxed);
            if (seen >> 32 != job || part >= parts_.load(std::memory_order_relaxed)) return;
            if (!next_.compare_exchange_weak(seen, seen + 1, std::memory_order_acq_rel, std::memory_order_acquire)) continue;
            work(part, context);
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
    std::atomic<uint64_t> next_{0};  // the job's number in the high half, its next part in the low one
    std::atomic<Work> work_{nullptr};
    std::atomic<const void*> context_{nullptr};
    std::atomic<int64_t> parts_{0}, done_{0};
    std::atomic<int> helpers_{0}, asleep_{0};
    std::atomic<bool> stopping_{false};
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
