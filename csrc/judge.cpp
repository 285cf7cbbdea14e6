#include "judge.hpp"

#include <locale.h>
#include <stdlib.h>

#include <charconv>
#include <cmath>
#include <optional>
#include <string>

namespace rlef {
namespace {

constexpr double kTolerance = 1e-5;
constexpr std::string_view kSeparators = " \n\t\r\v";  // not form feed: code_contests keeps it inside tokens
constexpr std::string_view kLineBlanks = " \t\r\v\f";

std::string_view take_token(std::string_view& text) {
    const auto begin = text.find_first_not_of(kSeparators);
    if (begin == std::string_view::npos) {
        text = {};
        return {};
    }
    text.remove_prefix(begin);
    const auto token = text.substr(0, text.find_first_of(kSeparators));
    text.remove_prefix(token.size());
    return token;
}

char lower(char letter) {
    return letter >= 'A' && letter <= 'Z' ? static_cast<char>(letter + 32) : letter;
}

bool equal_ignoring_case(std::string_view left, std::string_view right) {
    if (left.size() != right.size()) return false;
    for (std::size_t i = 0; i < left.size(); ++i) {
        if (lower(left[i]) != lower(right[i])) return false;
    }
    return true;
}

double out_of_range_value(std::string_view token) {
    static const locale_t c_locale = ::newlocale(LC_ALL_MASK, "C", nullptr);
    return ::strtod_l(std::string(token).c_str(), nullptr, c_locale);  // infinity or a denormal
}

/// What absl::SimpleAtod makes of a token: decimal, "inf" or "nan", one optional sign, nothing left over.
std::optional<double> number(std::string_view token) {
    if (!token.empty() && token.front() == '+') {
        token.remove_prefix(1);
        if (!token.empty() && token.front() == '-') return std::nullopt;
    }
    double value = 0;
    const auto [end, error] = std::from_chars(token.data(), token.data() + token.size(), value);
    if (error == std::errc::invalid_argument || end != token.data() + token.size()) return std::nullopt;
    return error == std::errc::result_out_of_range ? out_of_range_value(token) : value;
}

bool values_match(std::string_view expected, std::string_view output) {
    const auto expected_number = number(expected);
    const auto output_number = number(output);
    if (!expected_number || !output_number) return equal_ignoring_case(expected, output);
    return std::abs(*expected_number - *output_number) < kTolerance;
}

bool tokens_match(const Judge& judge, std::string_view expected, std::string_view output) {
    if (judge.ignore_case ? equal_ignoring_case(expected, output) : expected == output) return true;
    if (judge.absolute == 0 && judge.relative == 0) return false;
    const auto expected_number = number(expected);
    const auto output_number = number(output);
    if (!expected_number || !output_number) return false;
    const double distance = std::abs(*expected_number - *output_number);
    if (!std::isfinite(distance)) return false;
    return distance <= judge.absolute || distance <= judge.relative * std::abs(*expected_number);
}

/// Compares token by token: `same` for two tokens that agree.
template <typename Same>
bool all_tokens(std::string_view expected, std::string_view output, Same same) {
    while (true) {
        const auto expected_token = take_token(expected);
        const auto output_token = take_token(output);
        if (expected_token.empty() || output_token.empty())
            return expected_token.empty() && output_token.empty();
        if (!same(expected_token, output_token)) return false;
    }
}

std::string_view take_line(std::string_view& text) {
    const auto length = text.find('\n');
    const auto line = text.substr(0, length);
    text.remove_prefix(length == std::string_view::npos ? text.size() : length + 1);
    const auto last = line.find_last_not_of(kLineBlanks);
    return line.substr(0, last == std::string_view::npos ? 0 : last + 1);
}

bool lines_equal(std::string_view expected, std::string_view output) {
    while (!expected.empty() || !output.empty()) {
        if (take_line(expected) != take_line(output)) return false;  // a text at its end has only empty lines
    }
    return true;
}

}  // namespace

bool outputs_match(const Judge& judge, std::string_view expected, std::string_view output) {
    switch (judge.kind) {
        case Judge::Kind::Exact:
            return lines_equal(expected, output);
        case Judge::Kind::Tokens:
            return all_tokens(expected, output,
                              [&judge](auto left, auto right) { return tokens_match(judge, left, right); });
        case Judge::Kind::Any:
            return true;
        case Judge::Kind::CodeContests:
            break;
    }
    // First the whole lists as words: "nan" equals "nan" there, though not as a number.
    return all_tokens(expected, output, equal_ignoring_case) || all_tokens(expected, output, values_match);
}

}  // namespace rlef
