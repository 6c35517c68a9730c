// A small pool of threads for products, shared by all of them and as large as the caller says (torch's thread count).
#pragma once

#include <cstdint>

namespace tersor {

// Calls `work(part, context)` for every part in [0, parts), on up to `threads` threads, the calling one among them, and
// returns when all are done. Parts are handed out one by one, so which thread runs which is not fixed: what a part writes
// must not depend on it. Called from within a part, it runs everything there. One caller at a time; others wait.
using Work = void (*)(int64_t part, const void* context);
void run_parts(int64_t parts, int threads, Work work, const void* context);

// The same for any callable `f(part)`; nothing is copied or allocated.
template <typename F>
void parallel(int64_t parts, int threads, const F& f) {
    run_parts(parts, threads, [](int64_t part, const void* context) { (*static_cast<const F*>(context))(part); }, &f);
}

}  // namespace tersor
