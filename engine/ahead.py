"""A private Ray session that begins ahead of time, while the driver still imports what it needs.

A session takes two seconds to start, of which its own processes work and the driver waits; importing torch and the
models takes as long, on another core. `begin` starts the session in a thread, and the next `cluster` takes it if it is
what is wanted. The thread stays until the session ends: Linux kills the session's processes with the thread that
started them.
"""

import threading

_begun: "list[_Session]" = []


class _Session:
    """A session of so many `cpus`, from its start in a thread until `end`."""

    def __init__(self, cpus: int) -> None:
        self.cpus = cpus
        self._there, self._over = threading.Event(), threading.Event()
        self._thread = threading.Thread(target=self._hold, daemon=True)
        self._thread.start()

    def _hold(self) -> None:
        from scarcade.engine.cluster import cluster

        try:
            with cluster(cpus=self.cpus):
                self._there.set()
                self._over.wait()
        except Exception:  # noqa: BLE001 - whoever wants a session tries again, and tells what is wrong with it
            pass
        finally:
            self._there.set()

    def own(self) -> bool:
        """Whether this is the thread that holds it."""
        return threading.current_thread() is self._thread

    def wait(self) -> None:
        """Until it is there."""
        self._there.wait()

    def end(self) -> None:
        """Until it is gone; one that is not there yet goes by itself, or with this process, and is not waited for."""
        begun = self._there.is_set()
        self._over.set()
        if begun:
            self._thread.join()


def begin(cpus: int) -> None:
    """Start a session of so many `cpus`."""
    _begun.append(_Session(cpus))


def settle(cpus: int | None) -> None:
    """Wait for a session that was begun ahead; end it if it has not so many `cpus` (None: any other is wanted)."""
    for session in _begun:
        if session.own():
            return
        session.wait()
        if session.cpus != cpus:
            end()
            return


def end() -> None:
    """End a session that was begun ahead."""
    while _begun:
        _begun.pop().end()
