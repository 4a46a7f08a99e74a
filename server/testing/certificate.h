// Certificates for servers and clients on this machine.

#ifndef SERVER_TESTING_CERTIFICATE_H_
#define SERVER_TESTING_CERTIFICATE_H_

#include <cstdlib>
#include <string>

namespace pipeweaver::server {

// Makes a certificate for localhost and 127.0.0.1, signed by itself: PATH.pem
// and its key, PATH.key. False without the openssl command.
inline bool MakeCertificate(const std::string& path) {
  const std::string command =
      "openssl req -x509 -newkey ec -pkeyopt ec_paramgen_curve:prime256v1 "
      "-nodes -days 2 -subj /CN=localhost -addext "
      "subjectAltName=DNS:localhost,IP:127.0.0.1 -keyout " +
      path + ".key -out " + path + ".pem 2>/dev/null";
  return std::system(command.c_str()) == 0;
}

}  // namespace pipeweaver::server

#endif  // SERVER_TESTING_CERTIFICATE_H_
