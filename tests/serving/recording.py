"""`vllm serve --scheduler-cls serving.recording.Recording`: a scheduler that writes its steps to a file."""

import json
import os

from serving.engines import STEPS_FILE, step_rows
from vllm.v1.core.sched.async_scheduler import AsyncScheduler


class Recording(AsyncScheduler):
    """A line of JSON for each step: its rows, and the prompts of requests that are new."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self._steps = open(os.environ[STEPS_FILE], "a", buffering=1)  # noqa: SIM115 - open as long as the process

    def schedule(self, *args, **kwargs):
        output = super().schedule(*args, **kwargs)
        asked = {new.req_id: list(new.prompt_token_ids) for new in output.scheduled_new_reqs}
        if output.num_scheduled_tokens:
            self._steps.write(json.dumps({"rows": step_rows(output), "asked": asked}) + "\n")
        return output
