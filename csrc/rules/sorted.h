// A few sorted numbers: find, insert, and the statistics that a sorted array gives away.
#pragma once

#include "rules/precision.h"

namespace gradfast {

// How many of the `count` sorted values are less than `x`: where it belongs.
GF_HOST_DEVICE int rank_of(const double* sorted, int count, double x) {
  int first = 0;
  while (count > 0) {
    const int half = count / 2;
    if (sorted[first + half] < x) {
      first += half + 1;
      count -= half + 1;
    } else {
      count = half;
    }
  }
  return first;
}

// Puts `x` into its place among `count` sorted values.
GF_HOST_DEVICE void insert(double* sorted, int count, double x) {
  const int at = rank_of(sorted, count, x);
  GF_NO_UNROLL
  for (int i = count; i > at; --i) sorted[i] = sorted[i - 1];
  sorted[at] = x;
}

// Takes out one value, which must be there.
GF_HOST_DEVICE void remove(double* sorted, int count, double x) {
  GF_NO_UNROLL
  for (int i = rank_of(sorted, count, x); i + 1 < count; ++i) sorted[i] = sorted[i + 1];
}

GF_HOST_DEVICE double median_of(const double* sorted, int count) {
  return count % 2 ? sorted[count / 2] : (sorted[count / 2 - 1] + sorted[count / 2]) / 2;
}

// The median of |x - centre|, where centre is the median: walks outwards from the middle, nearest first.
GF_HOST_DEVICE double median_deviation(const double* sorted, int count, double centre) {
  int low = count / 2 - 1, high = count / 2;
  double before = 0, last = 0;
  GF_NO_UNROLL
  for (int taken = 0; taken <= count / 2; ++taken) {
    const bool take_low = high >= count || (low >= 0 && centre - sorted[low] < sorted[high] - centre);
    before = last;
    last = take_low ? centre - sorted[low--] : sorted[high++] - centre;
  }
  return count % 2 ? last : (before + last) / 2;
}

}  // namespace gradfast
