"""A gRPC proxy in front of the real server that makes single answers go wrong.

    python3 fault_proxy.py PORT TARGET_PORT FAULTS_JSON

Faults as in fake_server.py: "delay_s", "corrupt", "lose".
"""

import concurrent.futures
import json
import sys
import time

import grpc

from pipeweaver.client import METHODS, SERVICE
from pipeweaver.v1 import planner_service_pb2 as service_pb2


def forwarder(channel, method, faults):
    call = channel.unary_unary(f"/{SERVICE}/{method}")  # bytes in and out

    def forward(request, context):
        try:
            response = call(request, timeout=context.time_remaining(),
                            metadata=context.invocation_metadata())
        except grpc.RpcError as error:
            context.abort(error.code(), error.details())
        if method == "GetProgram":
            return disturb(service_pb2.GetProgramRequest.FromString(request),
                           response, context, faults)
        return response

    return forward


def disturb(request, response, context, faults):
    step, rank = request.key.step, request.rank
    if [step, rank] in faults.get("lose", ()):
        context.abort(grpc.StatusCode.UNAVAILABLE, "lost")
    time.sleep(faults.get("delay_s", {}).get(str(step), 0))
    if [step, rank] in faults.get("corrupt", ()):
        changed = service_pb2.GetProgramResponse.FromString(response)
        middle = len(changed.data) // 2
        changed.data = (changed.data[:middle] +
                        bytes([changed.data[middle] ^ 1]) +
                        changed.data[middle + 1:])
        return changed.SerializeToString()
    return response


def serve(port, target_port, faults):
    channel = grpc.insecure_channel(f"127.0.0.1:{target_port}")
    server = grpc.server(concurrent.futures.ThreadPoolExecutor(16))
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(
        SERVICE, {name: grpc.unary_unary_rpc_method_handler(
            forwarder(channel, name, faults)) for name in METHODS}),))
    if not server.add_insecure_port(f"127.0.0.1:{port}"):
        raise SystemExit(f"port {port} is taken")
    server.start()
    print("ready", flush=True)
    server.wait_for_termination()


if __name__ == "__main__":
    serve(int(sys.argv[1]), int(sys.argv[2]), json.loads(sys.argv[3]))
