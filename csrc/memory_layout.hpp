#pragma once

namespace rlef {

/// Moves the interpreter's code into huge pages of this process, where the machine has them and the code
/// holds a whole one. A child maps them by copying one entry; pages of a file it would fault in one by one,
/// in every test. The copy has the addresses of the original, and can be read and executed, but not written.
void put_code_into_huge_pages();

/// Takes every free piece of the heap, so that children allocate from its end: one page after the other,
/// which no parent holds. A free list leads through pages all over the heap, and a child copies each that it
/// touches.
void fill_gaps_of_heap();

}  // namespace rlef
