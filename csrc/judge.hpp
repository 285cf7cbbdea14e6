#pragma once

#include <string_view>

namespace rlef {

/// How outputs are compared.
///
/// CodeContests, as google-deepmind/code_contests: split at blanks, lower-case; equal lists pass, else lists
/// of one length whose tokens are pairwise equal or, where both are numbers, less than 1e-5 apart. Exact:
/// equal after blanks at the ends of lines, and empty lines at the end, are removed. Tokens: split at blanks;
/// tokens are pairwise equal or, where both are finite numbers, within one of the tolerances. Any: all pass.
struct Judge {
    enum class Kind { CodeContests, Exact, Tokens, Any };
    Kind kind = Kind::CodeContests;
    double absolute = 0;  // Tokens: the rest
    double relative = 0;  // to the expected number
    bool ignore_case = false;
};

/// Whether a program's output is accepted.
bool outputs_match(const Judge& judge, std::string_view expected, std::string_view output);

}  // namespace rlef
