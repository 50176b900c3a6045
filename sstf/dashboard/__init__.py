"""The live page: training runs, evaluations, engines and this machine, while they work.

`board` holds what is watched and asks it for news; `app` serves the page (`page/`) and its stream of events. Nothing
here imports torch: the page has to be up in under two seconds, and beside a training it has to cost next to nothing.
"""
