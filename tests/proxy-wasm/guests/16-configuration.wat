(on configure
  (call $num @size@ (local.get $n))
  (call $show @buffer@ (call $get_buffer_bytes #7 #0 #100 OUT))
  #1)
