#pragma once

namespace cutlass {

struct FastDivmod {
  int divisor;
  FastDivmod(int divisor) : divisor(divisor) {}
  int div(int x) const { return x / divisor; }
  void operator()(int& quotient, int& remainder, int x) const { quotient = x / divisor, remainder = x % divisor; }
};

}  // namespace cutlass
