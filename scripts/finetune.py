"""Fine-tune a MiniMax-M3 checkpoint: the command `minimax-m3 train` as a file, for `accelerate launch` and `torchrun`.

python scripts/finetune.py --model CHECKPOINT --dataset rows.jsonl --output_dir run --lora
"""

from modeling_minimax_m3.commands.train import main

if __name__ == "__main__":
    main()
