"""CloudWatch Logs, as much as the worker agent puts into it, on loopback.

Lines are kept, so that a test can read what would be in the account's logs. The agent finds it by
AWS_ENDPOINT_URL_CLOUDWATCH_LOGS; signatures are not looked at.

Source: https://docs.aws.amazon.com/AmazonCloudWatchLogs/latest/APIReference/API_PutLogEvents.html
"""

import json
import threading
from collections import defaultdict
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Self


class CloudWatchLogs:
    """The service; entered it answers.

    Attributes:
        lines: What was put into the log streams, by the stream's name.
        refused: Calls that are not known here; no test should cause any.
    """

    def __init__(self) -> None:
        self.lines: dict[str, list[str]] = defaultdict(list)
        self.refused: list[str] = []
        logs = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"
            # Head and body are two writes, and the second would wait for an acknowledgement.
            disable_nagle_algorithm = True

            def do_POST(self) -> None:
                data = self.rfile.read(int(self.headers.get("content-length") or 0))
                status, body = logs.answer(self.headers.get("x-amz-target"), data)
                self.send_response(status)
                self.send_header("content-type", "application/x-amz-json-1.1")
                self.send_header("content-length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

            def log_message(self, *_arguments: object) -> None:
                """Say nothing."""

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.05,))

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_exception: object) -> None:
        self._server.shutdown()
        self._thread.join(10)
        self._server.server_close()

    @property
    def environment(self) -> dict[str, str]:
        """The variable by which the agent finds it."""
        url = f"http://127.0.0.1:{self._server.server_port}"
        return {"AWS_ENDPOINT_URL_CLOUDWATCH_LOGS": url}

    def answer(self, target: str | None, data: bytes) -> tuple[int, bytes]:
        """Return status and body for a call."""
        if target != "Logs_20140328.PutLogEvents":
            self.refused.append(f"{target}: {data[:200]!r}")
            return 400, b'{"__type": "InvalidOperationException"}'
        request = json.loads(data)
        self.lines[request["logStreamName"]] += [one["message"] for one in request["logEvents"]]
        return 200, b'{"nextSequenceToken": "1"}'
