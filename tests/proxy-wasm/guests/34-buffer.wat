(on request_body
  (call $two @request@ (local.get $n) (local.get $eos))
  (if (i32.eqz (local.get $eos)) (then (return #1)))
  (call $show @all@ (call $body #0 #1000))
  #0)
(on response_body
  (call $two @response@ (local.get $n) (local.get $eos))
  (if (i32.eqz (local.get $eos)) (then (return #1)))
  (call $show @all@ (call $body #1 #1000))
  #0)
