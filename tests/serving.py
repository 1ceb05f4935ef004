"""An app of the server that is served by a thread of the tests' process."""

import threading
import time
from typing import Any

import uvicorn

from soundwave.serve.server import configuration
from soundwave.serve.settings import Limits, bind


class InThread:
    """Serves an app at a free port until it is closed; what its exceptions would log is left out."""

    def __init__(self, app: Any, limits: Limits):
        config = configuration(app, limits)
        config.log_level = "critical"
        config.configure_logging()
        self.server = uvicorn.Server(config)
        bound = bind("127.0.0.1", 0)
        self.port = bound.getsockname()[1]
        self.thread = threading.Thread(target=self.server.run, kwargs={"sockets": [bound]})
        self.thread.start()
        while not self.server.started:
            assert self.thread.is_alive()
            time.sleep(0.01)

    def close(self) -> None:
        """End the server as a signal would."""
        self.server.should_exit = True
        self.thread.join(20)
