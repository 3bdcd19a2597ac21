"""The engine for CPUs: its answers are torch's, it sends nothing, and where it is not there nothing fails."""
import os
import subprocess
import sys
import warnings
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn

from cspine import engine
from cspine.bundle import load_bundle
from cspine.classification import CrackNetBiLSTM, predict_probabilities
from cspine.presets import get_preset
from cspine.segmentation import UNet3d

needed = pytest.mark.skipif(engine._openvino() is None, reason='openvino is not installed')


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope='module')
def net():
    torch.manual_seed(0)
    return UNet3d(2, 3, (4, 8)).eval()


def off(f, net, *shape):
    with torch.no_grad():
        x = torch.rand(shape)
        got, want = f(x), net(x)
    many = isinstance(want, (list, tuple))
    return max(float((a-b).abs().max()/b.abs().max().clamp(min=1)) for a, b in zip(*(v if many else [v] for v in (got, want)), strict=True))


@needed
def test_the_demo_bundle_s_networks_answer_as_torch_does():
    bundle = load_bundle()
    stage1, stage2 = bundle.segmentation[0].eval(), bundle.classification[0].eval()
    for net, any_size, shapes in ((stage1.low, True, ((1, 3, 24, 16, 32), (1, 3, 16, 16, 16))), (stage1.fine.net, True, ((1, 33, 16, 12, 8),)),
                                  (stage2.encoder, False, ((3, 3, 128, 128), (1, 3, 128, 128)))):
        f = engine.compiled(net, any_size)
        assert all(off(f, net, *shape) <= engine.TOLERANCE for shape in shapes)
        assert [run is not None for _, run in f.made.values()] == [True]   # one for all shapes


@needed
def test_threads_are_torch_s_and_weights_the_newest(net):
    f = engine.compiled(net, True)
    off(f, net, 1, 2, 8, 8, 8)
    run = [*f.made.values()][0][1]
    assert run.get_property('INFERENCE_NUM_THREADS') == 1 and run.get_property('INFERENCE_PRECISION_HINT').to_string() in ('f32', 'float')
    torch.set_num_threads(2)
    off(f, net, 1, 2, 8, 8, 8)
    assert [*f.made.values()][0][1].get_property('INFERENCE_NUM_THREADS') == 2
    before = [*f.made.values()][0][1]
    off(f, net, 1, 2, 4, 8, 16)
    assert [*f.made.values()][0][1] is before
    with torch.no_grad(): net.head.bias.add_(3); net.head.weight.mul_(2)
    assert off(f, net, 1, 2, 8, 8, 8) <= engine.TOLERANCE and [*f.made.values()][0][1] is not before   # a bias may be shared with torch


@needed
def test_an_engine_that_answers_otherwise_is_not_used(net, monkeypatch):
    right = engine._answers
    monkeypatch.setattr(engine, '_answers', lambda run, xs: [a+.1*a.abs().max() for a in right(run, xs)])
    with pytest.warns(UserWarning, match='OpenVINO cannot compute UNet3d .its answers are 0.1 off.: torch does'): assert off(engine.compiled(net, True), net, 1, 2, 8, 8, 8) == 0


@needed
def test_what_is_compiled_is_kept_only_where_it_is_told(net, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    off(engine.compiled(net, True), net, 1, 2, 8, 8, 8)
    assert not any(tmp_path.iterdir())
    cache = tmp_path/'cache'
    off(engine.compiled(net, True, cache), net, 1, 2, 8, 8, 8)
    assert sorted(p.suffix for p in cache.iterdir()) == ['.bin', '.xml']
    def never(*a): raise AssertionError('compiled again')
    with monkeypatch.context() as m:
        m.setattr(engine, '_converted', never)
        assert off(engine.compiled(net, True, cache), net, 1, 2, 8, 8, 8) <= engine.TOLERANCE
    weights = next(cache.glob('*.bin'))
    weights.write_bytes(np.frombuffer(weights.read_bytes(), np.uint8)[::-1].tobytes())   # not what this network is
    with pytest.warns(UserWarning, match='OpenVINO cannot compute'): assert off(engine.compiled(net, True, cache), net, 1, 2, 8, 8, 8) == 0


def test_without_the_package_torch_computes(net, monkeypatch):
    monkeypatch.setitem(sys.modules, 'openvino', None)
    assert engine.compiled(net) is net and engine.accelerate([net]) == 'torch' and engine.fastest(net) is net


@needed
def test_gradients_and_training_are_torch_s(net):
    f = engine.compiled(net, True)
    x = torch.rand(1, 2, 8, 8, 8, requires_grad=True)
    f(x).sum().backward()
    assert x.grad.abs().sum() > 0 and not f.made
    net.train()
    with torch.no_grad(): f(x)
    net.eval()
    assert not f.made


@needed
def test_a_network_that_openvino_does_not_know(monkeypatch):
    class Odd(nn.Module):
        def __init__(self):
            super().__init__()
            self.scale = nn.Parameter(torch.ones(()))
        def forward(self, x): return torch.special.bessel_j0(x)*self.scale
    odd = Odd().eval()
    with pytest.warns(UserWarning, match='OpenVINO cannot compute Odd'): assert off(engine.compiled(odd), odd, 2, 3) == 0


@needed
def test_nothing_is_sent(tmp_path):
    "No address is looked up, no connection tried, no file left in the home folder; openvino_telemetry is not even imported"
    code = '''
import socket, sys, urllib.request
tried = []
def told(name):
    def f(*a, **k): tried.append((name, a[1:])); raise OSError('no network here')
    return f
for name in ('connect', 'connect_ex', 'sendto'): setattr(socket.socket, name, told(name))
socket.getaddrinfo = told('getaddrinfo'); urllib.request.urlopen = told('urlopen')
import torch
from torch import nn
from cspine.engine import compiled
net = nn.Conv2d(1, 1, 3).eval()
with torch.no_grad(): f = compiled(net); f(torch.rand(2, 1, 8, 8))
assert all(run for _, run in f.made.values())
assert not any(m.startswith('openvino_telemetry') for m in sys.modules), 'imported'
assert not tried, tried
'''
    env = {k: v for k, v in os.environ.items() if k not in ('CI', 'TF_BUILD', 'JENKINS_URL', 'GITHUB_ACTIONS')} | {'HOME': str(tmp_path)}
    subprocess.run([sys.executable, '-c', code], check=True, env=env, timeout=120)
    assert not any('intel' in p.name.lower() for p in tmp_path.iterdir())


@needed
def test_a_network_that_another_thread_lets_go_leaves_this_one_s_signals_alone(tmp_path):
    "OpenVINO gives the thread that loads its plugin a stack for signals, and unmaps it with the plugin, in whichever thread: the next signal was the end"
    code = '''
import faulthandler, gc, os, signal, threading, torch
from cspine.engine import compiled
faulthandler.enable()
signal.signal(signal.SIGUSR1, lambda *a: print('handled'))
held = [compiled(torch.nn.Conv2d(1, 1, 3).eval())]
with torch.no_grad(): held[0](torch.rand(1, 1, 8, 8))
assert all(run for _, run in held[0].made.values())
other = threading.Thread(target=held.clear); other.start(); other.join(); gc.collect()
os.kill(os.getpid(), signal.SIGUSR1)
'''
    done = subprocess.run([sys.executable, '-W', 'ignore', '-c', code], capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stdout) == (0, 'handled\n'), done.stderr


@needed
def test_stage_2_by_the_engine_and_the_mirror_where_the_preset_says_so():
    torch.manual_seed(0)
    preset = replace(get_preset('tiny').classification, size=64, slices=6)
    model, rng = CrackNetBiLSTM(preset).eval(), np.random.default_rng(0)
    crops, present = rng.integers(0, 256, (7, preset.planes, 64, 64), dtype=np.uint8), np.array([1, 1, 1, 0, 1, 1, 1], bool)
    with torch.no_grad(): model.vertebra.weight.mul_(30)
    def ask(p, **k): return predict_probabilities([model], p, crops, present, **k)
    plain, one = ask(preset), ask(preset, mirror=False)
    assert np.abs(plain-one).max() > 1e-4
    np.testing.assert_array_equal(ask(replace(preset, mirror=False)), one)
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        assert engine.accelerate([model]).startswith('openvino')
        assert np.abs(ask(preset)-plain).max() < 1e-3
    assert model.encoder.engine.made
