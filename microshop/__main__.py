"""`python -m microshop` runs the whole shop."""
from microshop.run_all import main

if __name__ == "__main__":
    main()
