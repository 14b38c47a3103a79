"""The background thread that delivers: what goes wrong in it is a line in the log, never an exception in training."""

import logging
import threading

from pipeline.config.tracking import redact
from pipeline.tracking.client import first_line
from pipeline.tracking.delivery import Delivery

_log = logging.getLogger(__name__)

_MAX_BACKOFF_SECONDS = 60.0


class Flusher:
    """Runs deliveries in a daemon thread, at a steady pace and whenever somebody waits for one."""

    def __init__(self, delivery: Delivery, pause: float) -> None:
        self._delivery = delivery
        self._pause = pause
        self._changed = threading.Condition()
        self._wanted = 0  # passes that somebody waits for
        self._passed = 0
        self._busy = False
        self._succeeded = False
        self._stopping = False
        self._failures = 0
        self._reported: set[str] = set()
        self._thread = threading.Thread(target=self._loop, name="mlflow-delivery", daemon=True)
        self._thread.start()

    def flush(self, timeout: float) -> bool:
        """Wait for a pass that starts after now; False when it failed or did not end within `timeout` seconds."""
        with self._changed:
            # A pass in progress may have read the spool before the caller wrote to it.
            wanted = self._passed + (2 if self._busy else 1)
            self._wanted = max(self._wanted, wanted)
            self._changed.notify_all()
            self._changed.wait_for(lambda: self._passed >= wanted, timeout)
            return self._passed >= wanted and self._succeeded

    def stop(self, timeout: float) -> bool:
        """Deliver once more and end the thread; False when something is left for `sync`."""
        delivered = self.flush(timeout) if timeout > 0 else False
        with self._changed:
            self._stopping = True
            self._changed.notify_all()
        return delivered

    def _loop(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._stopping or self._wanted > self._passed, self._delay())
                if self._stopping:
                    return
                self._busy = True
            succeeded = self._pass()
            with self._changed:
                self._busy = False
                self._passed += 1
                self._succeeded = succeeded
                self._failures = 0 if succeeded else self._failures + 1
                self._changed.notify_all()

    def _delay(self) -> float:
        return min(self._pause * 2.0 ** min(self._failures, 16), max(self._pause, _MAX_BACKOFF_SECONDS))

    def _pass(self) -> bool:
        try:
            refused = self._delivery.run()
        except Exception as error:
            known = isinstance(error, ConnectionError)
            reason = str(error) if known else f"{type(error).__name__}: {first_line(error)}"
            self._report(f"{reason}; runs and metrics are kept locally")
            _log.debug("delivery failed", exc_info=True)
            return False
        for line in refused:
            self._report(f"MLflow refused {line}")
        if self._failures and not refused:
            _log.warning("MLflow is back; what was kept locally was delivered")
            self._reported.clear()
        return not refused

    def _report(self, message: str) -> None:
        if message not in self._reported:
            self._reported.add(message)
            _log.warning("%s", redact(message))
