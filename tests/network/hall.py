"""One server process for one run after the other: [CONFIGURATION, FOLDER, PORT], as JSON, for each."""

import json
import sys

import torch

from mocosfl.config import Config
from mocosfl.network.settings import ServeSettings
from mocosfl.serving import serve

if __name__ == "__main__":
    torch.set_num_threads(1)
    for run in sys.argv[1:]:
        config, out, port = json.loads(run)
        serve(Config.from_yaml(config), ServeSettings(listen=f"127.0.0.1:{port}"), out)
