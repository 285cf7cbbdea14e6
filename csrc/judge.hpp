#pragma once

#include <string_view>

namespace rlef {

enum class Judge { CodeContests, Exact };

/// Whether a program's output is accepted.
///
/// CodeContests, as google-deepmind/code_contests: split at blanks, lower-case; equal lists pass, else lists
/// of one length whose tokens are pairwise equal or, where both are numbers, less than 1e-5 apart. Exact:
/// equal after blanks at the ends of lines, and empty lines at the end, are removed.
bool outputs_match(Judge judge, std::string_view expected, std::string_view output);

}  // namespace rlef
