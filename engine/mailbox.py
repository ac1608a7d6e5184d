"""Short messages between a driver and its workers, through the key-value store of Ray's head.

They work on every cluster, with or without a shared file system, and cost no process. Lines of metrics and
sentences go to the driver; the wish to stop, and an error that no retry mends, go to the workers.
"""

import itertools
import json
from collections.abc import Mapping
from typing import Any

_NAMESPACE = b"scarcade"


class Mailbox:
    """The messages of one launch; to be used while Ray is initialised."""

    def __init__(self, launch: str) -> None:
        self._launch = launch
        self._written = itertools.count()
        self._read = 0

    def post(self, name: str, value: Mapping[str, Any]) -> None:
        """Set `name` to `value`."""
        from ray.experimental.internal_kv import _internal_kv_put

        _internal_kv_put(self._key(name), json.dumps(value).encode(), namespace=_NAMESPACE)

    def look(self, name: str) -> dict[str, Any] | None:
        """The value of `name`, or None."""
        from ray.experimental.internal_kv import _internal_kv_get

        found = _internal_kv_get(self._key(name), namespace=_NAMESPACE)
        return None if found is None else dict(json.loads(found))

    def send(self, attempt: str, message: Mapping[str, Any]) -> None:
        """Queue `message` for the driver; `attempt` tells the groups of workers of one launch apart."""
        self.post(f"line-{attempt}-{next(self._written)}", message)
        self.post("attempt", {"now": attempt})

    def received(self) -> list[dict[str, Any]]:
        """What workers sent since the last call, in order."""
        from ray.experimental.internal_kv import _internal_kv_del

        attempt = self.look("attempt")
        if attempt is None:
            return []
        if getattr(self, "_attempt", None) != attempt["now"]:
            self._attempt, self._read = attempt["now"], 0
        messages = []
        while (message := self.look(name := f"line-{self._attempt}-{self._read}")) is not None:
            _internal_kv_del(self._key(name), namespace=_NAMESPACE)
            self._read += 1
            messages.append(message)
        return messages

    def clear(self) -> None:
        """Remove all messages of this launch."""
        from ray.experimental.internal_kv import _internal_kv_del

        _internal_kv_del(self._key(""), del_by_prefix=True, namespace=_NAMESPACE)

    def _key(self, name: str) -> bytes:
        return f"{self._launch}/{name}".encode()
