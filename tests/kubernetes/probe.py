"""A kubelet's probes of a container."""

import time
from collections.abc import Mapping
from contextlib import closing
from http import HTTPStatus
from http.client import HTTPConnection, HTTPException

from tests.kubernetes.manifests import Object


class Probe:
    """An HTTP probe of a container.

    Args:
        spec: Probe in the manifest.
        address: IP address of the pod.
        ports: Ports of the container, by name.
        scale: Factor on the time between probes.
    """

    def __init__(self, spec: Object, address: str, ports: Mapping[str, int], scale: float) -> None:
        get = spec["httpGet"]
        self._place = address, ports.get(get["port"], get["port"])
        self._path = get["path"]
        self._period = scale * spec["periodSeconds"]
        self._timeout = spec.get("timeoutSeconds", 1)
        self._limit = spec.get("failureThreshold", 3)
        self._failed = 0
        self.due = time.monotonic() + scale * spec.get("initialDelaySeconds", 0)

    def ask(self) -> bool | None:
        """Probe once. Returns True if healthy, False if failed, None below the threshold."""
        self.due = time.monotonic() + self._period
        try:
            with closing(HTTPConnection(*self._place, timeout=self._timeout)) as connection:
                connection.request("GET", self._path)
                well = connection.getresponse().status < HTTPStatus.BAD_REQUEST
        except (OSError, HTTPException):
            well = False
        self._failed = 0 if well else self._failed + 1
        if well:
            return True
        return False if self._failed >= self._limit else None
