// The namespace of everything in csrc: panfpn::fused in sources whose multiplications and additions the
// compiler may fuse, panfpn::unfused in all others. CMakeLists.txt lists the fused sources and defines
// PANFPN_FUSED for them. Without the two namespaces, a template of a shared header would have one name in
// both kinds of sources, and the linker would keep either instance, fused or not. Both namespaces are inline,
// so that names are written as panfpn::name. tests/install/test_symbols.py checks that no symbol is outside
// of them.
#pragma once

#if defined(PANFPN_FUSED)
#define PANFPN_ARITHMETIC fused
#else
#define PANFPN_ARITHMETIC unfused
#endif
