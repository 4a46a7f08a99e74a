"""The planner's service as plain calls, over grpc's generic channel."""

from dataclasses import dataclass
from typing import Any, Optional

import grpc

from pipeweaver.v1 import planner_service_pb2 as service_pb2

SERVICE = "pipeweaver.v1.PlannerService"
METHODS = ("RegisterJob", "ConfirmLayout", "DescribeJob", "ListJobs",
           "RemoveJob", "SubmitStep", "CancelStep", "GetPlan", "GetProgram",
           "ReportStep", "UploadProfile", "CompareStrategies", "SimulatePlan")


@dataclass
class ClientOptions:
    # Bearer token, for servers that want one. Spaces and line ends around it are
    # dropped: it may be what a file holds.
    token: str = ""
    # PEM bytes. Set: TLS; the other two for servers that ask for a client's.
    root_certificates: Optional[bytes] = None
    private_key: Optional[bytes] = None
    certificate_chain: Optional[bytes] = None
    # A connection on which nothing has come for so long is probed, and given up
    # when the probe is not answered: one that died without a word would else be
    # waited on for many minutes. The server wants 20 s at least between probes.
    probe_after_s: float = 30.0
    probe_timeout_s: float = 5.0


class ClosedError(grpc.RpcError):
    """The client was closed; looks like a call that close() has ended."""

    def code(self) -> grpc.StatusCode:
        return grpc.StatusCode.CANCELLED

    def details(self) -> str:
        return "the client is closed"


class PlannerClient:
    """One channel. Thread-safe. Calls raise grpc.RpcError; ClosedError, which is
    one, behind close(). Raises ValueError for a token that is not printable ASCII.
    """

    def __init__(self, address: str, options: Optional[ClientOptions] = None):
        options = options or ClientOptions()
        token = options.token.strip()
        if not (token.isascii() and token.isprintable()):
            raise ValueError("token: must be printable ASCII")  # a secret: not shown
        self._metadata = ([("authorization", f"Bearer {token}")]
                          if token else None)
        self._closed = False
        # A server that comes back is found again within a second, by a call
        # that waits for it. The min option is the time to connect in.
        arguments = [("grpc.initial_reconnect_backoff_ms", 100),
                     ("grpc.min_reconnect_backoff_ms", 5000),
                     ("grpc.max_reconnect_backoff_ms", 1000),
                     ("grpc.keepalive_time_ms",
                      int(options.probe_after_s * 1e3)),
                     ("grpc.keepalive_timeout_ms",
                      int(options.probe_timeout_s * 1e3)),
                     ("grpc.http2.max_pings_without_data", 0),
                     ("grpc.use_local_subchannel_pool", 1)]
        if options.root_certificates is not None:
            self._channel = grpc.secure_channel(
                address, grpc.ssl_channel_credentials(
                    options.root_certificates, options.private_key,
                    options.certificate_chain), arguments)
        else:
            self._channel = grpc.insecure_channel(address, arguments)
        self._calls = {
            name: self._channel.unary_unary(
                f"/{SERVICE}/{name}",
                request_serializer=getattr(
                    service_pb2, f"{name}Request").SerializeToString,
                response_deserializer=getattr(
                    service_pb2, f"{name}Response").FromString)
            for name in METHODS}

    def close(self) -> None:
        """Ends calls in flight with CANCELLED."""
        self._closed = True
        self._channel.close()

    def call(self, method: str, request: Any, timeout_s: float,
             wait_for_ready: bool = False) -> Any:
        """Calls a method of METHODS with its request message.

        wait_for_ready: waits for a server that is away instead of UNAVAILABLE.
        grpc connects within calls; between them it looks every 5 s only.
        """
        try:
            return self._calls[method](request, timeout=timeout_s,
                                       metadata=self._metadata,
                                       wait_for_ready=wait_for_ready)
        except ValueError:  # what grpc makes of a closed channel
            if not self._closed:
                raise
            raise ClosedError() from None

    def begin(self, method: str, request: Any, timeout_s: float) -> grpc.Future:
        """The call in progress."""
        try:
            return self._calls[method].future(request, timeout=timeout_s,
                                              metadata=self._metadata)
        except ValueError:
            if not self._closed:
                raise
            raise ClosedError() from None
