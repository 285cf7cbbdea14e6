#include "message.hpp"

#include <errno.h>
#include <string.h>
#include <sys/socket.h>

#include <system_error>

#include "must.hpp"

namespace rlef {
namespace {

constexpr std::size_t kMostText = 16'384;
constexpr std::size_t kMostFds = 6;

template <typename Header>
bool send_any(int socket, const Header& header, std::string_view text, const std::vector<int>& fds) {
    // Its end: what an interpreter says of a program ends with the error's name.
    if (text.size() > kMostText) text.remove_prefix(text.size() - kMostText);
    iovec parts[2] = {{const_cast<Header*>(&header), sizeof header},
                      {const_cast<char*>(text.data()), text.size()}};
    alignas(cmsghdr) char control[CMSG_SPACE(kMostFds * sizeof(int))] = {};
    msghdr message = {};
    message.msg_iov = parts;
    message.msg_iovlen = 2;
    if (!fds.empty()) {
        message.msg_control = control;
        message.msg_controllen = CMSG_SPACE(fds.size() * sizeof(int));
        cmsghdr* rights = CMSG_FIRSTHDR(&message);
        rights->cmsg_level = SOL_SOCKET;
        rights->cmsg_type = SCM_RIGHTS;
        rights->cmsg_len = CMSG_LEN(fds.size() * sizeof(int));
        ::memcpy(CMSG_DATA(rights), fds.data(), fds.size() * sizeof(int));
    }
    while (::sendmsg(socket, &message, MSG_NOSIGNAL) < 0) {
        if (errno == EPIPE || errno == ECONNRESET) return false;
        if (errno != EINTR) fail("sendmsg");
    }
    return true;
}

template <typename Header>
std::optional<Message<Header>> receive_any(int socket, int flags) {
    Message<Header> received{};
    char text[kMostText];
    iovec parts[2] = {{&received.header, sizeof received.header}, {text, sizeof text}};
    alignas(cmsghdr) char control[CMSG_SPACE(kMostFds * sizeof(int))];
    msghdr message = {};
    message.msg_iov = parts;
    message.msg_iovlen = 2;
    message.msg_control = control;
    message.msg_controllen = sizeof control;
    ssize_t size;
    while ((size = ::recvmsg(socket, &message, flags | MSG_CMSG_CLOEXEC)) < 0) {
        if (errno == ECONNRESET) return std::nullopt;
        if (errno != EINTR) fail("recvmsg");
    }
    if (size == 0) return std::nullopt;
    for (cmsghdr* rights = CMSG_FIRSTHDR(&message); rights; rights = CMSG_NXTHDR(&message, rights)) {
        const std::size_t count = (rights->cmsg_len - CMSG_LEN(0)) / sizeof(int);
        for (std::size_t i = 0; i < count; ++i) {
            int fd;
            ::memcpy(&fd, CMSG_DATA(rights) + i * sizeof fd, sizeof fd);
            received.fds.emplace_back(fd);
        }
    }
    if (static_cast<std::size_t>(size) < sizeof received.header) {
        errno = EBADMSG;
        fail("recvmsg");
    }
    received.text.assign(text, static_cast<std::size_t>(size) - sizeof received.header);
    return received;
}

}  // namespace

bool send_message(int socket, const Request& header, std::string_view text, const std::vector<int>& fds) {
    return send_any(socket, header, text, fds);
}

bool send_message(int socket, const Report& header, std::string_view text, const std::vector<int>& fds) {
    return send_any(socket, header, text, fds);
}

std::optional<Message<Request>> receive_request(int socket) {
    return receive_any<Request>(socket, 0);
}

std::optional<Message<Report>> receive_report(int socket, int flags) {
    return receive_any<Report>(socket, flags);
}

}  // namespace rlef
