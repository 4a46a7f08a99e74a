"""Measured times on their way to the planner: records of a profile.

    records = ProfileRecords("cupti_agent", host)
    records.add("pw:module=vision,layer=transformer,pass=forward,tokens=512", ns)
    client.call("UploadProfile", UploadProfileRequest(
        job=name, profile=records.take()), timeout_s)
"""

import threading
from typing import Dict, List, Optional

from pipeweaver.v1 import profile_pb2

_PREFIX = "pw:"
_FIGURES = {"items": "items", "tokens": "tokens", "sum_squares": "sum_squares",
            "max_tokens": "max_tokens",
            "condition_tokens": "condition_tokens",
            "condition_products": "condition_products",
            "tp": "tensor_parallel",
            "cp": "context_parallel"}
_PASSES = {"forward": profile_pb2.LAYER_PASS_FORWARD,
           "backward": profile_pb2.LAYER_PASS_BACKWARD,
           "input_grad": profile_pb2.LAYER_PASS_INPUT_GRAD,
           "weight_grad": profile_pb2.LAYER_PASS_WEIGHT_GRAD}


def layer_key(annotation: str) -> Optional[profile_pb2.LayerKey]:
    """What a layer's annotation names (LayerKey in profile.proto); None for any
    other text, and for one with an unknown or repeated field or a bad figure."""
    if not annotation.startswith(_PREFIX):
        return None
    key = profile_pb2.LayerKey()
    seen = set()
    for field in annotation[len(_PREFIX):].split(","):
        name, equals, value = field.partition("=")
        if not equals or not value or name in seen:
            return None
        seen.add(name)
        if name in ("module", "layer"):
            setattr(key, name, value)
        elif name == "pass" and value in _PASSES:
            setattr(key, "pass", _PASSES[value])
        elif name in _FIGURES and value.isascii() and value.isdigit():
            try:
                setattr(key, _FIGURES[name], int(value))
            except ValueError:
                return None
        else:
            return None
    return key if {"module", "layer", "pass"} <= seen else None


class ProfileRecords:
    """Times of layers' passes, collected until take(). Thread-safe.

    Holds at most `most_layers` different passes; times of others, and of texts
    that name no layer, are counted in `left_out`.
    """

    def __init__(self, kind: str, host: str, most_layers: int = 4096):
        """kind: of the source, see ProfileSource; host: that measured."""
        self._kind = kind
        self._host = host
        self._most = most_layers
        self._lock = threading.Lock()
        # By LayerKey, serialised.
        self._times: Dict[bytes, List[int]] = {}
        self._version = 0
        self.left_out = 0

    def add(self, annotation: str, ns: int) -> None:
        """One pass took `ns` nanoseconds of its device's time."""
        key = layer_key(annotation)
        with self._lock:
            data = key.SerializeToString() if key is not None else b""
            if not data or ns < 0 or (data not in self._times and
                                      len(self._times) >= self._most):
                self.left_out += 1
                return
            self._times.setdefault(data, []).append(ns)

    def take(self) -> Optional[profile_pb2.Profile]:
        """All times since the call before as a profile; None: there are none."""
        with self._lock:
            taken, self._times = self._times, {}
            if not taken:
                return None
            self._version += 1
            profile = profile_pb2.Profile(format_version=1,
                                          version=self._version)
        profile.sources.add(kind=self._kind, name=self._host)
        for data in sorted(taken):
            times = sorted(taken[data])
            point = profile.points.add(
                count=len(times), min_ns=times[0],
                median_ns=times[len(times) // 2], max_ns=times[-1],
                total_ns=sum(times))
            point.key.kind = profile_pb2.POINT_KIND_LAYER
            point.key.layer.ParseFromString(data)
        return profile
