#!/usr/bin/env bash
# A model of a folder of pictures: bash examples/own_folder.sh PHOTOS OUT
# PHOTOS holds a folder of pictures for each class, or just pictures. Needs pip install 'jlt[quickstart]'. A stopped command
# goes on when the script is started again. On a GPU add --device cuda, and see docs/own-pictures.md for larger presets.
set -euo pipefail
photos=$1 out=$2
jlt encode "$photos" "$out/latents" --image-size 64 --num-held-out 200 --mirrored
jlt latents show "$out/latents" --out "$out/latents.png"
jlt train small "$out/latents" "$out/run" --flip --samples-every 1000 --held-out-every 1000
jlt sample "$out/run" "$out/samples" --num 64
jlt evaluate "$out/run" "$out/latents"
jlt report "$out/run/evaluation"
