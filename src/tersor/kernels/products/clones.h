// Before a function: compiled for AVX-512, AVX2 and any machine, and chosen when the module is loaded.
#pragma once

#if defined(__x86_64__) && defined(__GNUC__) && defined(__linux__)
#define TERSOR_CLONES __attribute__((target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default")))
#else
#define TERSOR_CLONES
#endif
