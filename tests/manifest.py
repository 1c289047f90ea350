"""The manifest for Kubernetes, as its tests look at it: by kind and name, and as files of a pod."""
import os
from pathlib import Path
from typing import Any
from unittest import mock

from microshop.chassis import config
from microshop.kubernetes import OPTIONS, check, make_manifest
from tests.helpers import clean_environment

WORKLOADS = ("StatefulSet", "Deployment")
ALL_FLAGS = ("--live", "--autoscale=5", "--expose=LoadBalancer", "--rate=100/s", "--quiet",
             "--scrape-from=monitoring", "--storage-class=fast", "--timeout=3", "--grace=7.5")


class Manifest:
    """What `python -m microshop.kubernetes` prints with these flags."""

    def __init__(self, *flags: str):
        with mock.patch.dict(os.environ, clean_environment(), clear=True):
            settings = config.read("microshop.kubernetes", OPTIONS, check, [*flags])
        self.content = make_manifest(settings)
        self.items: list[dict] = self.content["items"]

    def of_kind(self, *kinds: str) -> dict[str, dict]:
        """Return the items of these kinds, by name."""
        return {item["metadata"]["name"]: item for item in self.items if item["kind"] in kinds}

    def templates(self) -> dict[str, dict]:
        """Return the pod templates, by the name of the workload."""
        return {name: item["spec"]["template"] for name, item in self.of_kind(*WORKLOADS).items()}

    def pod(self, name: str) -> dict:
        """Return the spec of the pods of a workload."""
        return self.templates()[name]["spec"]

    def container(self, name: str) -> dict:
        """Return the only container of a workload's pods."""
        [container] = self.pod(name)["containers"]
        return container

    def variables(self, name: str) -> dict[str, str]:
        """Return the environment of a workload's container."""
        return {entry["name"]: entry["value"] for entry in self.container(name)["env"]}

    def source_of(self, name: str) -> dict[str, str]:
        """Return the text of each file that the ConfigMaps put into a pod, by its path."""
        volumes = {volume["name"]: volume for volume in self.pod(name)["volumes"]}
        files = {}
        for mount in self.container(name)["volumeMounts"]:
            configured = volumes.get(mount["name"], {}).get("configMap")
            if configured:
                data = self.of_kind("ConfigMap")[configured["name"]]["data"]
                files |= {f"{mount['mountPath']}/{key}": text for key, text in data.items()}
        return files

    def write_source(self, name: str, root: Path) -> None:
        """Write those files below a folder, read-only, as the kubelet does."""
        for path, text in self.source_of(name).items():
            target = root / path.removeprefix("/")
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_text(text, "utf-8")
            target.chmod(0o444)


def selected_by(selector: dict[str, str], templates: dict[str, dict[str, Any]]) -> set[str]:
    """Return the names of the workloads whose pods have these labels."""
    return {name for name, template in templates.items()
            if selector.items() <= template["metadata"]["labels"].items()}
