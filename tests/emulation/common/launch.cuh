#pragma once

#include "emulation.h"

namespace kda {

inline void launch_dependents() {}
inline void wait_for_previous_kernel() {}
inline int this_thread() { return emulation::cta.current; }
inline uint32_t this_sm() { return 0; }
inline uint32_t all_sms() { return 1; }
inline int this_warp_of_sm() { return emulation::warp(); }

}  // namespace kda
