"""A multi-turn scheduler that can be told from the outside: whatever the student answers, it is asked once more. On a server it makes
two samples of a row with a column ``split``."""

from __future__ import annotations

from swift.rollout import MultiTurnScheduler, multi_turns


class AskAgain(MultiTurnScheduler):
    async def run(self, infer_request, request_config, **kwargs):
        output = await super().run(infer_request, request_config, **kwargs)
        return [output, output] if infer_request.data_dict.get('split') else output

    def check_finished(self, infer_request, response_choice, current_turn) -> bool:
        return current_turn >= 2

    def step(self, infer_request, response_choice, current_turn) -> dict:
        infer_request.messages.append({'role': 'user', 'content': 'what is 1 plus 1 ?'})
        return {'infer_request': infer_request}


multi_turns['ask_again'] = AskAgain
