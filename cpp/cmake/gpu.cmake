# GPU kernels. A build links exactly one of cuda/ and hip/.
