// Vector instructions beyond the baseline that every x86-64 has: a function marked so is compiled for
// AVX-512, for AVX2 and for the baseline, and the loader picks what the processor has. Whatever it inlines is
// compiled with it. Other architectures (aarch64 has its vectors in the baseline) and compilers without this
// get the one version.
//
// No version fuses multiplications and additions (-ffp-contract=off), so all of them give the same bits.
#pragma once

// The clones are named by instruction sets. By name of a processor ("arch=haswell") the loader would pick
// them on that one model only, and the baseline on all later ones. GCC 12 is the first to know the levels of
// x86-64.
#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__) && __GNUC__ >= 12
#define PANFPN_VECTOR_CLONES __attribute__((target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default")))
#elif defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
#define PANFPN_VECTOR_CLONES __attribute__((target_clones("avx512f", "avx2", "default")))
#else
#define PANFPN_VECTOR_CLONES
#endif

// For what such a function calls: without it the compiler may leave the call, and the callee as it is for
// every x86-64.
#if defined(__GNUC__)
#define PANFPN_ALWAYS_INLINE inline __attribute__((always_inline))
#else
#define PANFPN_ALWAYS_INLINE inline
#endif
