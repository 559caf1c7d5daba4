"""Run pre-trained nnU-Net v2 models on electron-microscopy volumes of any size."""
