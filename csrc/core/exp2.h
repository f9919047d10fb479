// 2^f for |f| <= 1/2 as a polynomial.
#pragma once

#include "core/host_device.h"

namespace INFLECTION_CORE {

// Minimax, relative error 9.3e-8, exactly 1 at 0; the highest power first.
constexpr float kExp2Series[] = {0x1.5bda36p-10f, 0x1.3ce8aap-7f, 0x1.c6b6d8p-5f, 0x1.ebf9c2p-3f, 0x1.62e42ap-1f, 1.0f};
constexpr float kRound = 0x1.8p23f;  // x + kRound has the integer nearest to x in the low bits of its mantissa

}  // namespace INFLECTION_CORE
