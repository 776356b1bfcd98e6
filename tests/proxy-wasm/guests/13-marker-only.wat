;; abi 0_1_0
(on request_headers (call $num @end@ (local.get $eos)) #0)
