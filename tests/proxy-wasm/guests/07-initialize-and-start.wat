(func (export "_initialize") (call $log @initialize@))
(func (export "main") (param i32 i32) (result i32) (call $two @main@ (local.get 0) (local.get 1)) #0)
(func (export "__main_void") (result i32) (call $log @void main@) #0)
(func (export "_start") (call $log @start@))
