#pragma once

namespace rlef {

/// Takes every free piece of the heap, so that children allocate from its end: one page after the other,
/// which no parent holds. A free list leads through pages all over the heap, and a child copies each that it
/// touches.
void fill_gaps_of_heap();

}  // namespace rlef
