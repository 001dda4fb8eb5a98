// Vector instructions beyond the x86-64 baseline. A function with PANFPN_VECTOR_CLONES is compiled for
// AVX-512, for AVX2 and for the baseline, together with everything that it inlines; the loader chooses the
// version for the processor. Other architectures and compilers without this attribute get one version (on
// aarch64, the baseline includes vector instructions).
//
// In sources without fused multiply-adds (-ffp-contract=off, the default), all versions give the same bits.
// In the sources that CMakeLists.txt lists in PANFPN_FUSED_SOURCES, the AVX-512 version, and from GCC 12 on
// the AVX2 version, fuse multiplications and additions. The baseline cannot, so that its results differ in
// the last bits.
#pragma once

#include "arithmetic.h"

// The clones are named by instruction set. For the name of a processor ("arch=haswell"), the loader would
// choose the clone on that model only, and the baseline on all later ones. GCC supports the
// x86-64 levels from version 12 on.
#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
#define PANFPN_HAS_VECTOR_CLONES
#if __GNUC__ >= 12
#define PANFPN_VECTOR_CLONES __attribute__((target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default")))
#else
#define PANFPN_VECTOR_CLONES __attribute__((target_clones("avx512f", "avx2", "default")))
#endif
#else
#define PANFPN_VECTOR_CLONES
#endif

// For functions that a cloned function calls. Without always_inline the compiler may keep the call, and the
// callee is compiled for the baseline only.
#if defined(__GNUC__)
#define PANFPN_ALWAYS_INLINE inline __attribute__((always_inline))
#else
#define PANFPN_ALWAYS_INLINE inline
#endif
