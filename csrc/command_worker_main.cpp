// The executable that runs commands. Arguments: the supervisor's process id, the devices, separated by
// colons, and the paths that commands may read. Its socket is descriptor 3.

#include <exception>
#include <iostream>
#include <sstream>
#include <string>
#include <vector>

#include "command_worker.hpp"

namespace {

constexpr int kSocket = 3;

std::vector<std::string> split(const char* text) {
    std::istringstream stream(text);
    std::vector<std::string> parts;
    for (std::string part; std::getline(stream, part, ':');) parts.push_back(part);
    return parts;
}

}  // namespace

int main(int count, char** arguments) {
    if (count < 4) {
        std::cerr << "usage: command_worker SUPERVISOR DEVICES READABLE...\n";
        return 2;
    }
    try {
        const rlef::FileView view{{arguments + 3, arguments + count}, {}, split(arguments[2]), true};
        rlef::serve_commands(kSocket, std::stoi(arguments[1]), view);
    } catch (const std::exception& error) {
        std::cerr << error.what() << "\n";
        return 1;
    }
}
