// An HTTP/2 connection by its frames, for what no client of gRPC's library
// does.

#ifndef SERVER_TESTING_RAW_CONNECTION_H_
#define SERVER_TESTING_RAW_CONNECTION_H_

#include <arpa/inet.h>
#include <netinet/in.h>
#include <sys/socket.h>
#include <sys/time.h>
#include <unistd.h>

#include <cerrno>
#include <cstdint>
#include <cstdlib>
#include <optional>
#include <string>
#include <utility>

namespace pipeweaver::server {

// Not thread-safe.
class RawConnection {
 public:
  // RFC 9113, sections 6 and 4.1.
  enum Type : uint8_t { kHeaders = 1, kSettings = 4, kPing = 6 };
  static constexpr uint8_t kAck = 1;
  static constexpr uint8_t kEndHeaders = 4;

  struct Frame {
    uint8_t type = 0;
    uint8_t flags = 0;
    std::string payload;
  };

  // Connects to `address`, IPv4:port, and begins with default settings.
  explicit RawConnection(const std::string& address)
      : fd_(socket(AF_INET, SOCK_STREAM, 0)) {
    const size_t colon = address.rfind(':');
    sockaddr_in to = {};
    to.sin_family = AF_INET;
    inet_pton(AF_INET, address.substr(0, colon).c_str(), &to.sin_addr);
    to.sin_port =
        htons(static_cast<uint16_t>(std::atoi(address.c_str() + colon + 1)));
    timeval silence = {};
    silence.tv_sec = 30;
    setsockopt(fd_, SOL_SOCKET, SO_RCVTIMEO, &silence, sizeof(silence));
    if (connect(fd_, reinterpret_cast<const sockaddr*>(&to), sizeof(to)) != 0) {
      std::abort();
    }
    Send("PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n");
    Write(kSettings, 0, 0, "");
  }
  ~RawConnection() { close(fd_); }
  RawConnection(const RawConnection&) = delete;
  RawConnection& operator=(const RawConnection&) = delete;

  // Does nothing on a connection that the other side has closed.
  void Write(Type type, uint8_t flags, uint32_t stream,
             const std::string& payload) {
    Send(BigEndian(static_cast<uint32_t>(payload.size()), 3) +
         BigEndian(type, 1) + BigEndian(flags, 1) + BigEndian(stream, 4) +
         payload);
  }

  // Begins a call of `method` (/service/name), without its message.
  void BeginCall(uint32_t stream, const std::string& method) {
    Write(kHeaders, kEndHeaders, stream,
          Field(":method", "POST") + Field(":scheme", "http") +
              Field(":path", method) + Field(":authority", "test") +
              Field("te", "trailers") +
              Field("content-type", "application/grpc"));
  }

  // The next frame; nothing at the connection's end or after 30 s of silence.
  std::optional<Frame> Read() {
    std::string header;
    if (!Receive(9, &header)) return std::nullopt;
    uint32_t size = 0;
    for (int i = 0; i < 3; ++i) {
      size = size << 8 | static_cast<uint8_t>(header[i]);
    }
    std::string payload;
    if (!Receive(size, &payload)) return std::nullopt;
    return Frame{static_cast<uint8_t>(header[3]),
                 static_cast<uint8_t>(header[4]), std::move(payload)};
  }

  // Whether the other side has closed it; known once Read returns nothing.
  bool ended() const { return ended_; }

 private:
  static std::string BigEndian(uint32_t value, int bytes) {
    std::string text;
    for (int i = bytes - 1; i >= 0; --i) {
      text.push_back(static_cast<char>(value >> (8 * i)));
    }
    return text;
  }

  // RFC 7541, section 6.2.2; both shorter than 127 bytes.
  static std::string Field(const std::string& name, const std::string& value) {
    return BigEndian(0, 1) + BigEndian(static_cast<uint32_t>(name.size()), 1) +
           name + BigEndian(static_cast<uint32_t>(value.size()), 1) + value;
  }

  void Send(const std::string& bytes) {
    size_t sent = 0;
    while (sent < bytes.size()) {
      const ssize_t n =
          send(fd_, bytes.data() + sent, bytes.size() - sent, MSG_NOSIGNAL);
      if (n < 0) return;
      sent += static_cast<size_t>(n);
    }
  }

  bool Receive(size_t size, std::string* bytes) {
    bytes->resize(size);
    size_t got = 0;
    while (got < size) {
      const ssize_t n = recv(fd_, bytes->data() + got, size - got, 0);
      if (n <= 0) {
        ended_ = n == 0 || errno == ECONNRESET;
        return false;
      }
      got += static_cast<size_t>(n);
    }
    return true;
  }

  const int fd_;
  bool ended_ = false;
};

}  // namespace pipeweaver::server

#endif  // SERVER_TESTING_RAW_CONNECTION_H_
