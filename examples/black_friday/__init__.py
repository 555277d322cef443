"""Black Friday: ten thousand orders in a minute for the shop, whose card company is slow.

make example-black-friday                                       # 10 000 orders in a minute; takes several minutes
make example-black-friday ARGS="--orders 600 --seconds 20"      # fewer, for a small machine
"""
