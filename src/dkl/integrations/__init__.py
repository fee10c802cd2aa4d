"""The losses inside other people's training loops: timm, Lightning, Hugging Face's Trainer.

Nothing is imported here. Import the module of the loop you have:

- ``dkl.integrations.timm``: a training task, ``pip install "dkl[timm]"``;
- ``dkl.integrations.lightning``: a LightningModule and a callback, ``pip install
  "dkl[lightning]"``;
- ``dkl.integrations.transformers``: a Trainer, ``pip install "dkl[transformers]"``;
- ``dkl.integrations.distillation``: the loss that all of them hold; needs torch alone.
"""
