import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # a test that wants the network is a mistake
