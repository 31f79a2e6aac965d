import sys; sys.path.insert(0, __file__.rpartition("/")[0])
import time
from pathlib import Path
import mocosfl, json
from grid import Nodes, digits, parts
from rich.console import Console
from mocosfl.flower.serving import serve
from mocosfl.flower.settings import FlowerSettings
import mocosfl.flower.cohort as c

def losses(run): 
    return {l["step"]: l["loss"] for l in map(json.loads, (Path(run)/"metrics.jsonl").read_text().splitlines()) if "loss" in l}

def test_equal(tmp_path, monkeypatch):
    monkeypatch.setattr(c, "PAUSE", 0.01)
    mocosfl.train(digits(**{"train.epochs": .05}), tmp_path/"half")
    con = digits(**{"clients.frozen": True, "clients.init": str(tmp_path/"half")})
    (tmp_path/"r.yaml").write_text(con.to_yaml())
    t=time.time()
    r=serve(FlowerSettings(recipe=str(tmp_path/"r.yaml"), out=str(tmp_path/"run"), steps=5, give_up=5), Nodes(parts(3)), console=Console(width=160))
    print(time.time()-t)
    mocosfl.train(con, tmp_path/"sim")
    a,b=losses(tmp_path/"run"), losses(tmp_path/"sim")
    print([(k, a[k], b[k], a[k]-b[k]) for k in a])
    assert a.keys()==b.keys()
    assert max(abs(a[k]-b[k]) for k in a)<1e-5

def test_avg(tmp_path, monkeypatch):
    monkeypatch.setattr(c, "PAUSE", 0.01)
    con = digits(**{"sync.every": 1, "train.momentum": 0.0, "train.lr": 3e-5, "contrast.momentum": 0.5, "train.epochs": 0.13})
    (tmp_path/"r.yaml").write_text(con.to_yaml())
    r=serve(FlowerSettings(mode="average", recipe=str(tmp_path/"r.yaml"), out=str(tmp_path/"run"), give_up=5), Nodes(parts(3)), console=Console(width=160))
    mocosfl.train(con, tmp_path/"sim")
    a,b=losses(tmp_path/"run"), losses(tmp_path/"sim")
    print([(k, a[k], b[k], a[k]-b[k]) for k in a])
    assert max(abs(a[k]-b[k]) for k in a)<1e-4

    import torch
    from safetensors.torch import load_file
    from mocosfl.encoder import Encoder
    def half(run):
        w = load_file(run / "encoder.safetensors"); return torch.cat([w[n].flatten() for n in sorted(w) if n.startswith("client.")])
    st = Encoder(con.model, 1, 8, con.seed).client.state_dict()
    moved = half(tmp_path/"sim") - torch.cat([st[n].flatten() for n in sorted(st)])
    print(moved.norm(), (half(tmp_path/"run")-half(tmp_path/"sim")).norm())
