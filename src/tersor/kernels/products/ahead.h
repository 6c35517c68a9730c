// What a thread reads after the part of a job that it is at, as far as can be told before: a hint. Loops that follow it
// fetch the beginning of the next part while they work on the end of theirs, where it would be waited for otherwise.
#pragma once

#include <cstdint>

namespace tersor {

// Where a part's codes and scales begin; null where nobody knows.
struct Beginning {
    const uint8_t* codes = nullptr;
    const uint8_t* scales = nullptr;
};

struct Ahead {
    Beginning next;                    // of the part after this one
    const uint8_t* fetched = nullptr;  // the codes that this thread has fetched already
};
inline thread_local Ahead ahead;

}  // namespace tersor
