// Which rows of a block of linear CKA are multiplied in float64; host and device.
#pragma once

#include "core/host_device.h"

namespace inflection {

// A row is long beyond so many times the mean of |u|^2 of its block: an eighth of the rows at most, whatever the features.
constexpr double kCkaLong = 8.0;

// Whether products of rows, of the third order too, may leave float32: `squares` is the sum of |u|^2 of a block. Its rows
// are then multiplied in float64, where a Gram matrix of any float32 features has room.
IF_HD bool cka_leaves_float(double squares) { return squares != 0.0 && !(squares >= 0x1p-60 && squares <= 0x1p68); }

}  // namespace inflection
