#pragma once

#include <linux/filter.h>

#include <cstdint>
#include <vector>

namespace rlef {

/// When a rule's action is taken; otherwise the rule's `otherwise` is.
enum class When : std::uint8_t {
    Always,
    Equal,      // the argument's low 32 bits are `value`
    OneOf,      // the argument's low 32 bits are among `values`
    HasBits,    // all bits of `value` are set in the argument's low 32 bits
    LacksBits,  // no bit of `value` is
    IsNull,     // all 64 bits of the argument are zero
};

/// One line of a policy: what happens at one system call.
struct Rule {
    std::uint32_t number;
    std::uint32_t action;  // SECCOMP_RET_*
    When when = When::Always;
    unsigned argument = 0;
    std::uint32_t value = 0;
    std::vector<std::uint32_t> values = {};
    std::uint32_t otherwise = 0;
};

/// A table, and what happens at numbers that it does not name.
struct Policy {
    std::vector<Rule> rules;     // each number at most once
    std::uint32_t unnamed;       // below the highest number named
    std::uint32_t beyond;        // above it
    std::uint32_t first_alien;   // numbers from here on (x32) are killed
    std::uint32_t architecture;  // AUDIT_ARCH_* of the only accepted one; 0: checked by an earlier filter
};

/// Compiles a policy to BPF: a binary search over the numbers, whose leaves check arguments.
std::vector<sock_filter> compile(const Policy& policy);

/// Puts the filter on this thread for good. Returns 0 or errno.
int install(const std::vector<sock_filter>& program);

}  // namespace rlef
