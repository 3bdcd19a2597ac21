"Weights into encoders: every source, every refusal, and never the network."
import importlib.util
import socket

import pytest
import timm
import torch
from safetensors.torch import save_file
from segmentation_models_pytorch.encoders import get_encoder

from cspine.encoders import PACKAGES, _packaged, load_encoder_weights
from cspine.presets import CspineError

LITE = 'tu-tf_efficientnet_lite0'


@pytest.fixture(autouse=True)
def no_network(monkeypatch):
    def refuse(*args, **kwargs): raise OSError('the test has no network')
    monkeypatch.setattr(socket.socket, 'connect', refuse)
    monkeypatch.setattr(socket, 'getaddrinfo', refuse)


def same(encoder, donor, prefix='model.'):
    "Number of tensors that are equal to the donor's, the stem compared channel by channel"
    want, n = donor.state_dict(), 0
    for k, v in encoder.state_dict().items():
        w = want[k.removeprefix(prefix)]
        if v.shape != w.shape:
            w = w[:, torch.arange(v.shape[1]) % 3] * (3 / v.shape[1])
        n += torch.equal(v, w)
    return n


@pytest.mark.parametrize('wrap', ['plain', 'state_dict', 'module', 'unet', 'other names'])
@pytest.mark.parametrize('suffix', ['.pth', '.safetensors'])
def test_a_file_maps_whole(tmp_path, wrap, suffix):
    donor = timm.create_model('tf_efficientnet_lite0', pretrained=False)
    sd = donor.state_dict()
    if wrap == 'module': sd = {f'module.{k}': v for k, v in sd.items()}
    if wrap == 'unet': sd = {f'encoder.model.{k}': v for k, v in sd.items()} | {'decoder.w': torch.zeros(2)}
    if wrap == 'other names': sd = {f't{999-i}': v for i, v in enumerate(sd.values())}
    path = tmp_path/f'w{suffix}'
    if suffix == '.pth': torch.save({'state_dict': sd, 'epoch': 3} if wrap == 'state_dict' else sd, path)
    else: save_file(sd, path)
    encoder = get_encoder(LITE, in_channels=30, weights=None)
    if (wrap, suffix) == ('other names', '.safetensors'):   # it keeps no order to match by
        with pytest.raises(CspineError, match='names differ'): load_encoder_weights(encoder, LITE, path)
        return
    said = load_encoder_weights(encoder, LITE, path)
    assert same(encoder, donor) == len(encoder.state_dict()) == 288
    assert str(path) in said and '288' in said


def test_smp_efficientnet_takes_timm_names_by_order(tmp_path):
    donor = timm.create_model('tf_efficientnet_b0', pretrained=False)
    torch.save(donor.state_dict(), tmp_path/'b0.pth')
    encoder = get_encoder('efficientnet-b0', in_channels=3, weights=None)
    load_encoder_weights(encoder, 'efficientnet-b0', tmp_path/'b0.pth')
    for a, b in zip(encoder.state_dict().values(), donor.state_dict().values()): assert torch.equal(a, b)


def test_resnet_from_timm(tmp_path):
    donor = timm.create_model('resnet18', pretrained=False)
    torch.save(donor.state_dict(), tmp_path/'r.pth')
    encoder = get_encoder('resnet18', in_channels=30, weights=None)
    load_encoder_weights(encoder, 'resnet18', tmp_path)
    assert same(encoder, donor, '') == len(encoder.state_dict())


def test_refusals_leave_the_encoder_alone(tmp_path):
    encoder = get_encoder(LITE, in_channels=30, weights=None)
    before = {k: v.clone() for k, v in encoder.state_dict().items()}
    (tmp_path/'text.pth').write_text('not weights')
    torch.save(timm.create_model('tf_efficientnet_lite1', pretrained=False).state_dict(), tmp_path/'other.pth')
    torch.save([1, 2], tmp_path/'list.pth')
    (tmp_path/'empty').mkdir()
    for weights, why in (('text.pth', 'cannot read'), ('other.pth', 'another encoder'), ('list.pth', 'no state dict'),
                         ('gone.pth', 'no weights at'), ('empty', 'holds 0'), ('.', 'name the file')):
        with pytest.raises(CspineError, match=why): load_encoder_weights(encoder, LITE, tmp_path/weights)
    assert all(torch.equal(v, before[k]) for k, v in encoder.state_dict().items())


def test_a_pickle_does_not_run(tmp_path):
    class Evil:
        def __reduce__(self): return (open, (str(tmp_path/'ran'), 'w'))
    torch.save({'w': Evil()}, tmp_path/'evil.pth')
    with pytest.raises(CspineError, match='cannot read'):
        load_encoder_weights(get_encoder('resnet18', weights=None), 'resnet18', tmp_path/'evil.pth')
    assert not (tmp_path/'ran').exists()


def test_nothing_there_is_a_sentence(monkeypatch):
    said = []
    encoder = get_encoder('resnet18', weights=None)
    load_encoder_weights(encoder, 'resnet18', log=said.append)
    assert 'random weights' in said[0]
    monkeypatch.setattr(importlib.util, 'find_spec', lambda name: None)
    assert 'cspine[pretrained]' in load_encoder_weights(get_encoder(LITE, weights=None), LITE)
    assert 'as asked' in load_encoder_weights(encoder, 'resnet18', 'none')


def test_timm_without_a_network_is_a_sentence(tmp_path, monkeypatch):
    monkeypatch.setenv('HF_HUB_OFFLINE', '1')
    def fail(*args, **kwargs): raise OSError('no route to host')
    monkeypatch.setattr(timm, 'create_model', fail)
    with pytest.raises(CspineError, match='no route to host'):
        load_encoder_weights(get_encoder('resnet18', weights=None), 'resnet18', 'timm')


def test_the_extra_maps_by_order():
    "The package's tensors under its own names; without the extra, that there is a sentence instead"
    encoder = get_encoder(LITE, in_channels=30, weights=None)
    said = load_encoder_weights(encoder, LITE)
    path = _packaged('tf_efficientnet_lite0')
    if path is None: assert 'random weights' in said; return
    want = list(torch.load(path, weights_only=True).values())[:288]
    got = list(encoder.state_dict().values())
    assert len(got) == 288 and '288' in said and PACKAGES['tf_efficientnet_lite0'].replace('_', '-') in said
    assert all(torch.equal(a, b) for a, b in zip(got[1:], want[1:]))
    torch.testing.assert_close(got[0].sum(1), want[0].sum(1))
