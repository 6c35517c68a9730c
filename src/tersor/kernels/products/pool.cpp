// See pool.h. Threads wait by spinning for a moment, then sleep: the products of one token follow each other within
// microseconds, and waking a thread takes longer than a small product.
#include "pool.h"

#include <atomic>
#include <chrono>
#include <condition_variable>
#include <memory>
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
constexpr std::chrono::microseconds SPIN{60};

void relax() {
#if defined(__x86_64__) || defined(_M_X64)
    _mm_pause();
#endif
}

// What the threads of a job share. It outlives the call that made it for as long as a late thread looks at it.
struct Job {
    Work work;
    const void* context;
    int64_t parts;
    int helpers;  // threads other than the caller's that may take part
    std::atomic<int64_t> next{0}, done{0};
    std::atomic<int> joined{0};

    void take_parts() {
        for (int64_t part; (part = next.fetch_add(1, std::memory_order_relaxed)) < parts;) {
            work(part, context);
            done.fetch_add(1, std::memory_order_release);
        }
    }
};

thread_local bool inside = false;

class Pool {
  public:
    ~Pool() { stop(); }

    void run(int64_t parts, int threads, Work work, const void* context) {
        std::lock_guard<std::mutex> one(caller_);
        const int helpers = static_cast<int>(std::min<int64_t>(threads, parts)) - 1;
        grow(helpers);
        auto job = std::make_shared<Job>();
        job->work = work;
        job->context = context;
        job->parts = parts;
        job->helpers = helpers;
        {
            std::lock_guard<std::mutex> lock(mutex_);
            job_ = job;
            number_.fetch_add(1, std::memory_order_release);
        }
        if (asleep_.load(std::memory_order_acquire) > 0) wake_.notify_all();
        inside = true;
        job->take_parts();
        inside = false;
        while (job->done.load(std::memory_order_acquire) < parts) relax();
    }

  private:
    void grow(int helpers) {
        while (static_cast<int>(threads_.size()) < helpers) threads_.emplace_back([this] { serve(); });
    }

    void serve() {
        inside = true;
        uint64_t seen = 0;
        while (wait_beyond(seen)) {
            std::shared_ptr<Job> job;
            {
                std::lock_guard<std::mutex> lock(mutex_);
                seen = number_.load(std::memory_order_relaxed);
                job = job_;
            }
            if (job->joined.fetch_add(1, std::memory_order_relaxed) < job->helpers) job->take_parts();
        }
    }

    bool wait_beyond(uint64_t seen) {
        const auto end = std::chrono::steady_clock::now() + SPIN;
        do {
            for (int i = 0; i < 64; ++i) {
                if (stopping_.load(std::memory_order_relaxed)) return false;
                if (number_.load(std::memory_order_acquire) != seen) return true;
                relax();
            }
        } while (std::chrono::steady_clock::now() < end);
        std::unique_lock<std::mutex> lock(mutex_);
        asleep_.fetch_add(1, std::memory_order_acq_rel);
        wake_.wait(lock, [&] { return stopping_.load() || number_.load() != seen; });
        asleep_.fetch_sub(1, std::memory_order_acq_rel);
        return !stopping_.load();
    }

    void stop() {
        {
            std::lock_guard<std::mutex> lock(mutex_);
            stopping_.store(true);
        }
        wake_.notify_all();
        for (std::thread& thread : threads_) thread.join();
    }

    std::mutex caller_, mutex_;
    std::condition_variable wake_;
    std::shared_ptr<Job> job_;
    std::atomic<uint64_t> number_{0};
    std::atomic<int> asleep_{0};
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
    if (parts <= 1 || threads <= 1 || inside) {
        for (int64_t part = 0; part < parts; ++part) work(part, context);
        return;
    }
    shared_pool().run(parts, threads, work, context);
}

}  // namespace tersor
