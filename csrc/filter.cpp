#include "filter.hpp"

#include <errno.h>
#include <linux/seccomp.h>
#include <stddef.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <algorithm>
#include <stdexcept>

namespace rlef {
namespace {

using Code = std::vector<sock_filter>;

constexpr std::size_t kFarthestJump = 255;  // jump distances of a conditional jump are 8 bits wide

sock_filter statement(unsigned code, std::uint32_t k) {
    return BPF_STMT(static_cast<std::uint16_t>(code), k);
}

sock_filter jump(unsigned code, std::uint32_t k, std::size_t if_true, std::size_t if_false) {
    if (if_true > kFarthestJump || if_false > kFarthestJump) throw std::logic_error("a jump too far");
    return BPF_JUMP(static_cast<std::uint16_t>(code), k, static_cast<std::uint8_t>(if_true),
                    static_cast<std::uint8_t>(if_false));
}

sock_filter load(std::size_t offset) {
    return statement(BPF_LD | BPF_W | BPF_ABS, static_cast<std::uint32_t>(offset));
}

sock_filter answer(std::uint32_t action) {
    return statement(BPF_RET | BPF_K, action);
}

std::size_t low_word(unsigned argument) {  // both supported architectures are little-endian
    return offsetof(seccomp_data, args) + argument * sizeof(std::uint64_t);
}

/// A leaf: loads the argument where the rule asks about one, and answers.
Code leaf(const Rule& rule) {
    const auto low = low_word(rule.argument);
    const auto high = low + sizeof(std::uint32_t);
    switch (rule.when) {
        case When::Always:
            return {answer(rule.action)};
        case When::Equal:
            return {load(low), jump(BPF_JMP | BPF_JEQ | BPF_K, rule.value, 0, 1), answer(rule.action),
                    answer(rule.otherwise)};
        case When::HasBits:
            return {load(low), statement(BPF_ALU | BPF_AND | BPF_K, rule.value),
                    jump(BPF_JMP | BPF_JEQ | BPF_K, rule.value, 0, 1), answer(rule.action),
                    answer(rule.otherwise)};
        case When::LacksBits:
            return {load(low), jump(BPF_JMP | BPF_JSET | BPF_K, rule.value, 1, 0), answer(rule.action),
                    answer(rule.otherwise)};
        case When::IsNull:
            return {load(low),           jump(BPF_JMP | BPF_JEQ | BPF_K, 0, 0, 3),
                    load(high),          jump(BPF_JMP | BPF_JEQ | BPF_K, 0, 0, 1),
                    answer(rule.action), answer(rule.otherwise)};
        case When::OneOf: {
            Code code{load(low)};
            const auto count = rule.values.size();
            for (std::size_t i = 0; i < count; ++i) {
                code.push_back(jump(BPF_JMP | BPF_JEQ | BPF_K, rule.values[i], count - i, 0));
            }
            code.push_back(answer(rule.otherwise));
            code.push_back(answer(rule.action));
            return code;
        }
    }
    throw std::logic_error("a rule without a leaf");
}

/// Numbers from `first` up to the next segment's share one leaf.
struct Segment {
    std::uint32_t first;
    Rule rule;
};

bool plain(const Rule& rule, std::uint32_t action) {
    return rule.when == When::Always && rule.action == action;
}

std::vector<Segment> segments_of(const Policy& policy) {
    auto rules = policy.rules;
    std::sort(rules.begin(), rules.end(), [](const Rule& a, const Rule& b) { return a.number < b.number; });
    std::vector<Segment> segments{{0, {0, policy.unnamed}}};
    const auto extend = [&segments](std::uint32_t first, const Rule& rule) {
        if (segments.back().first == first) {
            segments.back().rule = rule;
        } else if (rule.when != When::Always || !plain(segments.back().rule, rule.action)) {
            segments.push_back({first, rule});
        }
    };
    for (std::size_t i = 0; i < rules.size(); ++i) {
        if (i && rules[i].number == rules[i - 1].number) throw std::logic_error("a system call named twice");
        extend(rules[i].number, rules[i]);
        const bool last = i + 1 == rules.size();
        if (last || rules[i + 1].number != rules[i].number + 1) {
            const auto action = last ? policy.beyond : policy.unnamed;
            extend(rules[i].number + 1, {rules[i].number + 1, action});
        }
    }
    extend(policy.first_alien, {policy.first_alien, SECCOMP_RET_KILL_PROCESS});
    return segments;
}

Code search(const std::vector<Segment>& segments, std::size_t begin, std::size_t end) {
    if (end - begin == 1) return leaf(segments[begin].rule);
    const auto middle = begin + (end - begin) / 2;
    const auto left = search(segments, begin, middle);
    const auto right = search(segments, middle, end);
    Code code;
    if (left.size() <= kFarthestJump) {
        code.push_back(jump(BPF_JMP | BPF_JGE | BPF_K, segments[middle].first, left.size(), 0));
    } else {
        code.push_back(jump(BPF_JMP | BPF_JGE | BPF_K, segments[middle].first, 0, 1));
        code.push_back(statement(BPF_JMP | BPF_JA, static_cast<std::uint32_t>(left.size())));
    }
    code.insert(code.end(), left.begin(), left.end());
    code.insert(code.end(), right.begin(), right.end());
    return code;
}

}  // namespace

std::vector<sock_filter> compile(const Policy& policy) {
    Code code;
    if (policy.architecture) {
        code.push_back(load(offsetof(seccomp_data, arch)));
        code.push_back(jump(BPF_JMP | BPF_JEQ | BPF_K, policy.architecture, 1, 0));
        code.push_back(answer(SECCOMP_RET_KILL_PROCESS));
    }
    code.push_back(load(offsetof(seccomp_data, nr)));
    const auto segments = segments_of(policy);
    const auto tree = search(segments, 0, segments.size());
    code.insert(code.end(), tree.begin(), tree.end());
    return code;
}

int install(const std::vector<sock_filter>& program) {
    const sock_fprog filter{static_cast<unsigned short>(program.size()),
                            const_cast<sock_filter*>(program.data())};
    return ::syscall(SYS_seccomp, SECCOMP_SET_MODE_FILTER, 0, &filter) == 0 ? 0 : errno;
}

}  // namespace rlef
