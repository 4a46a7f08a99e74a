"""deploy/kubernetes.yaml: valid to the letter, and its configuration and ports fit.

Needs PyPI's kubernetes-validate (the API's schemas), and the server that bazel
built; tests/interop.sh sees to both.
"""

import pathlib
import subprocess
import tempfile
import unittest

import kubernetes_validate
import yaml

ROOT = pathlib.Path(__file__).resolve().parents[2]
SERVER = ROOT / "bazel-bin" / "server" / "pipeweaver_server"
# The oldest that the manifest says it is for, and a later one.
KUBERNETES_VERSIONS = ("1.27", "1.34")


class KubernetesTest(unittest.TestCase):
    @classmethod
    def setUpClass(cls):
        text = (ROOT / "deploy" / "kubernetes.yaml").read_text()
        cls.resources = {r["kind"]: r for r in yaml.safe_load_all(text)}

    def test_is_valid(self):
        for version in KUBERNETES_VERSIONS:
            for kind, resource in self.resources.items():
                with self.subTest(kind=kind, version=version):
                    kubernetes_validate.validate(resource, version, strict=True)

    def test_the_server_takes_the_configuration(self):
        (text,) = self.resources["ConfigMap"]["data"].values()
        with tempfile.NamedTemporaryFile("w", suffix=".textproto") as file:
            file.write(text)
            file.flush()
            done = subprocess.run(
                [SERVER, "--validate", f"--config={file.name}"],
                capture_output=True, text=True)
        self.assertEqual(done.returncode, 0, done.stderr)

    def test_names_and_ports_fit(self):
        (name, text), = self.resources["ConfigMap"]["data"].items()
        pod = self.resources["Deployment"]["spec"]["template"]
        (container,) = pod["spec"]["containers"]
        ports = {p["name"]: p["containerPort"] for p in container["ports"]}
        self.assertIn(f'listen_address: "0.0.0.0:{ports["grpc"]}"', text)
        self.assertIn(f'metrics_address: "0.0.0.0:{ports["metrics"]}"', text)
        for probe in ("startupProbe", "readinessProbe", "livenessProbe"):
            self.assertEqual(container[probe]["grpc"]["port"], ports["grpc"])
        self.assertEqual(
            pod["metadata"]["annotations"]["prometheus.io/port"],
            str(ports["metrics"]))
        (mount,) = container["volumeMounts"]
        self.assertEqual(
            container["args"], [f"--config={mount['mountPath']}/{name}"])
        service = self.resources["Service"]["spec"]
        self.assertEqual(
            {p["name"]: p["port"] for p in service["ports"]}, ports)
        self.assertLessEqual(
            service["selector"].items(), pod["metadata"]["labels"].items())


if __name__ == "__main__":
    unittest.main()
