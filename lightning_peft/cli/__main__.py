from lightning_peft.cli import main

main()
